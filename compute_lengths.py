"""Measure every conversation of a chat dataset in tokens, so that teacher batches can be full.

conversations ──render──► text ──tokenize──► index, length, num_tokens ──► Parquet
"""
