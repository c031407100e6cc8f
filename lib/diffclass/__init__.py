"""Diffusion classifiers: log p(x | y) from per-class diffusion losses, the posterior by Bayes' rule.

What is attacked is what predicts is what is derived: one noun, `classifiers.base.Classifier`, a function of pixels and of
noise. An import only goes down from room to room; import-linter holds the order, which is that of pyproject.toml.

Rooms, bottom to top:

    units        Pixel space [0,1] and model space [-1,1]: the only module that converts, and the checks that guard every entrance.
    noise        Noise levels, schedules, quadrature weights and shared noise. Timesteps never leave this module.
    intervals    Exact binomial bounds and the intervals of averages: no model, no randomness.
    device       Where tensors live, in which precision networks run, and how a step is replayed: the one module that names a device.
    storage      What is kept: files, records, weights, assets.
    denoisers    E[x0 | x_sigma, class] from closed forms, from networks, and from other people's networks.
    likelihood   log p(x | k) for every class: exact where there is a closed form, and by the losses of a diffusion model.
    data         The three worlds and your own pictures.
    classifiers  Every kind of classifier: pixels in [0,1] and noise -> logits.
    attacks      Attacks on whatever maps pixels to logits, written to be read.
    certify      Certificates: votes, bounds, radii.
    zoo          Every classifier and every attack that the course speaks of, by name.
    evaluation   Accuracies, clean and under attack: measured, stored, verified.
    training     How the networks in `assets/` are trained.
    audit        An audit of a claimed robustness: 40 checks, each a light with its evidence, and what to do when it is red.
    course       What notebooks use: checks, exercises, figures, widgets. Only notebooks and the command line import it.
    edition      The course as pages to read: a map of the notebooks, a site that asks nobody, and slides.
    cli          The command `diffclass`: open the course, look after its files, train, classify, evaluate, list, and write it as pages.

Classifiers, by the names of the registry:

    cnn             A small residual convolutional network, trained on clean images.
    adversarial     The same network, trained on the images that fool it.
    wide            A residual network of few blocks and many channels, trained on clean images.
    adversarial-wide The wide residual network, trained on the images that fool it.
    vit             Attention between the patches of a picture, without convolutions, trained on clean images.
    adversarial-vit The vision transformer, trained on the images that fool it.
    jem             A wide residual network whose logits are also log-densities, trained against pictures that it draws itself.
    dc              Bayes' rule on the per-class losses of a diffusion model.
    contrastive     The diffusion classifier whose heads were trained to tell the classes apart under noise.
    adversarial-dc  The diffusion classifier whose denoiser was trained on the images that fool it.
    tmdc            The diffusion classifier with an adapter that raised the truth of images that fool another network.
    tmdc-contrastive The same, by images that fool itself, and with the other classes lowered under the same noise.
    one-call        Where the contrastive network's answer without a class lies among those with one: the posterior, from one call.
    one-call-hardened The same, of the network that was trained on the images that fool it.
    vote            What the diffusion classifier answers most often under eleven noises.
    rdc1            One step of likelihood maximisation within the attacks' budget, then the diffusion classifier.
    rdc5            Five steps of likelihood maximisation within the attacks' budget, then the diffusion classifier.
    rdc-released    Likelihood maximisation as RDC's code does it, without an active limit, then the diffusion classifier.
    rdc-contrastive Five steps of likelihood maximisation, then the contrastive diffusion classifier.
    lm-cnn          Five steps of likelihood maximisation in front of the plain network.
    diffpure        Noise the picture, walk back with the unconditional denoiser, then ask the plain network.
    diffpure-tmdc   Noise the picture, walk back with the unconditional denoiser, then ask TMDC: what its paper would try next.
    idc             Translate the picture into the picture of its label; the nearest label wins.
"""

__version__ = "0.1.0"
