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
    "adalora",
    "embeddings",
    "combine",
    "convert",
    "inspect",
    "streaming_merge",
    "nf4",
    "qlora_memory",
)

STUDIES = (
    "serve_throughput",
    "serve_shapes",
    "serve_arrivals",
    "serve_cold",
    "serve_memory",
    "serve_soak",
    "train_throughput",
    "train_ablation",
    "plan_memory",
    "trec",
)
"""Run by hand: they take minutes, and data or memory of their own."""
