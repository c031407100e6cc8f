"""Diffusion classifiers: log p(x | y) from per-class diffusion losses, the posterior by Bayes' rule.

Floors, bottom to top (an import may only go down; `tests/test_architecture.py` enforces it):

    0  units  noise  certificates  results      import nothing of ours
    1  denoisers/  data                          E[x0 | x_sigma, class], and the worlds they are asked about
    2  likelihood  training                      log p(x | class) by integration; one training loop
    3  classifiers  attacks  smoothing           pixels in [0,1] -> logits in nats; what attacks and certifies them
    4  audit                                     the honest-evaluation checks (none yet)
    5  figures  course                           arrays -> figure; check(), exercises, predict and reveal
    6  widgets  cli                              sliders -> figure; the command `diffclass`
"""

__version__ = "0.1.0"
