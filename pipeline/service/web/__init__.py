"""The HTTP side of the server: the API below /v1, and the dashboard."""
