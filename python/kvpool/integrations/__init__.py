"""kvpool inside other people's code: an executor in torch, a cache for transformers.

Nothing here is imported by `import kvpool`. Each module needs an extra, and says which one where it is missing.
"""
