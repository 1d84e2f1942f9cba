"""Talking to a model over HTTP. server: routes; gate: who may enter; openai: requests; prompts: requests
into generations; worker: the engine's threads; answer: tokens into text; replies: shapes of answers; metrics;
serving: sockets and signals; page: the browser.
"""
