"""The preference MLLM: how a history becomes hidden states."""
