"""A client for servers of adapters that speak the OpenAI interface: vLLM and others."""
