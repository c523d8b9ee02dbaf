"""Preference VQA: questions about a user's history, made from any data set of the common schema.

The paper (arXiv 2512.06020) fine-tunes its MLLM on such questions first, so that it learns to reason over several
pictures. Its own questions are not known; these are ours.
"""
