"""One run on several processes, through torch.distributed: who does what, how they exchange numbers, and how they end together.

`Strategy` is what the trainer asks; `open_strategy` in choice.py starts the one that was asked for.
"""
