"""Talking to a model over HTTP. door: the port; server: routes; gate: who may enter; openai: requests;
prompts: requests into sequences; worker: the engine's threads; answer: tokens into text; replies: shapes of
answers; metrics; serving: the loop and signals; page: the browser.
"""
