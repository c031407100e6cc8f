"""Diffusion classifiers: log p(x | y) from per-class diffusion losses, the posterior by Bayes' rule.

Floors, bottom to top (an import may only go down; `tests/test_architecture.py` enforces it):

    0  units  noise  certificates  results       import nothing of ours
    1  denoisers/  data  cifar  pictures  assets  E[x0 | x_sigma, class], and the worlds they are asked about
    2  likelihood  training                       log p(x | class) by integration; one training loop
    3  classifiers  attacks  smoothing            pixels in [0,1] -> logits in nats; what attacks and certifies them
    4  exercises/  recipes                        what a reader is asked to write; how the networks were trained
    5  figures  course                            arrays -> figure; check(), grading, predict and reveal
    6  scenes/                                    the state of a few controls -> a frame
    7  widgets  cli                               sliders -> a frame; the command `diffclass`
"""

__version__ = "0.1.0"
