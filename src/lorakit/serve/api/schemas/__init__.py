"""What a client may send: every field is checked, and one that is not known is an error that names it.

The fields are OpenAI's, with the sampling fields that vLLM adds to them. OpenAI's own fields that this server cannot
honour may be null (many frameworks send all of them) and are refused otherwise. `user`, `metadata` and `store` change
nothing about an answer; they are accepted and not kept.
"""
