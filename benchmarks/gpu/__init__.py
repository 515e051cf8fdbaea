"""Everything that has to be measured on a GPU, by one command: ``python -m benchmarks.gpu --out DIR --budget SECONDS``.

See docs/gpu.md. Each piece is a process of its own with a deadline, and every figure is a line of ``DIR/gpu.jsonl``
that is on disk before the next is begun: an illegal access, a hang or a missing package costs one figure. The same
command again continues where an earlier one was cut off. Without a GPU the pieces run at tiny sizes, with Triton's
interpreter, which tests everything but the figures.
"""
