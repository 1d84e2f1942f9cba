"""Talking to a model over HTTP.

door: the port; app: routes; middleware: access; schemas: bodies of requests; requests: bodies into sequences;
engine_thread: the engine's threads; streaming: tokens into text; replies: bodies of answers; metrics;
serving: event loop and signals; page: the browser.
"""
