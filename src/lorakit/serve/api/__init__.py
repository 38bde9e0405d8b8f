"""The HTTP API: OpenAI's endpoints, adapters as models, vLLM's and LoRAX's ways to ask, health and metrics."""
