"""alignjax: alignment methods for Gemma-class models, on one training loop."""
