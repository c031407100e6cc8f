"""Diffusion classifiers: log p(x | y) from per-class diffusion losses, the posterior by Bayes' rule.

Floors, bottom to top (an import may only go down; `tests/test_architecture.py` enforces it):

    0  units  noise  certificates  results       import nothing of ours
    1  denoisers/  data  cifar  pictures  assets  E[x0 | x_sigma, class], and the worlds they are asked about
       bridges                                    from a picture to the picture of its label
    2  likelihood  training  sampling             log p(x | class) by integration; one training loop; drawing images
    3  classifiers  translation  defences         pixels in [0,1] -> logits in nats, in one forward for everything
       attacks  adaptive  smoothing  racing       what attacks, certifies and cheapens them
       gallery                                    pictures that a network drew
    4  exercises/  measuring                      what a reader is asked to write; losses kept image by image
       translation_training
    5  figures  course  recipes                   arrays -> figure; check() and grading; the course's own networks
    6  scenes/  trainers                          the state of a few controls -> a frame; how networks were trained
    7  widgets  cli/                              sliders -> a frame; the command `diffclass`
"""

__version__ = "0.1.0"
