"""The model as functional Flax modules: no I/O, no hidden state; caches go in and come back as values.

Axes, here and everywhere:

    B rows            T text positions     S cached positions    V vocabulary
    I images          C tiles an image     N tokens a tile       M tiles kept for a row
    D width           F hidden width       K key/value heads     G query heads for each of them    H head width

Weights are stored `[out, in]`. Parameters carry logical axis names; a `constrain` function, given by whoever knows the
mesh, places the activations.
"""
