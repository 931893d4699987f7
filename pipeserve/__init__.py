"""pipeserve: an OpenAI-compatible server for GGUF models, pipelined over one machine's GPUs."""

__version__ = "0.1.0"
