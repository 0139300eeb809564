"""Systems side by side on the same model and batch; run by ``tools/bench``.

models.py        what is measured: a model, a batch, a loss
systems.py       who is measured: ours, torch's own tuning, Opacus, vmap(grad), fastDP
worker.py        one system in one process of its own, which takes a step when told to
floor.py         the arithmetic of a step at the best rate that this machine's kernels reach
epoch.py         a whole epoch of real records instead of a step: `tools/bench epoch`
side_by_side.py  starts the workers, has them take turns, compares
picture.py       Markdown and plots of what was found
"""
