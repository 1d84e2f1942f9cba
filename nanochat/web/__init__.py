"""Talking to a model over HTTP. server: routes; gate: who may enter; openai: requests; prompts: requests into
generations; worker: the engine's threads; answer: tokens into text; replies: answers; metrics; page: the browser.
"""
