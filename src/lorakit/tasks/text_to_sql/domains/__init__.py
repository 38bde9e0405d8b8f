"""The tables of the task, by subject. The places, people and goods in them are invented."""
