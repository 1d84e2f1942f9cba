"""Talking to a model over HTTP: server (routes), worker (the engine's thread), openai (shapes), page
(browser).
"""
