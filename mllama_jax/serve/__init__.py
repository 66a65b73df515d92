"""An OpenAI-compatible server on the engine; the extra `serve`."""
