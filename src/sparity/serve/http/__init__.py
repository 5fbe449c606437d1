"""OpenAI's interface: requests in, answers out, whole or as they come."""
