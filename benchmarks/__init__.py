"""lorakit beside Hugging Face PEFT, one question a file: ``python -m benchmarks.load`` (``make bench`` runs all)."""

NAMES = (
    "imports",
    "attach",
    "save",
    "load",
    "switch",
    "forward",
    "saved_activations",
    "merge",
    "mixed_batch",
    "dora",
    "embeddings",
)
