"""Serving: many requests at once on one model, and a server with OpenAI's interface in front of it."""
