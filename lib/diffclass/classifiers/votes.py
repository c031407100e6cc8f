"""What a random classifier answers most often."""

import torch
from torch import Tensor, nn


class MajorityVote(nn.Module):
    """What a random classifier says most often: counts of its votes, which have no gradient.

    Formula     counts_k = #{i <= votes: argmax f_i(x) = k}; the first of equal classes wins
    Shapes      x [B,C,H,W] -> [B,K], rows sum to `votes`
    Why         one lucky draw no longer decides; attack `classifier` by averaged gradients and let this one judge
    Errors      ValueError for a deterministic classifier, whose votes would all be one; FloatingPointError for logits
                that are NaN and cannot vote
    """

    def __init__(self, classifier: nn.Module, votes: int):
        super().__init__()
        if getattr(classifier, "deterministic", True):
            raise ValueError(
                "expected a random classifier, got a deterministic one, whose votes are all the same; "
                "pass classifier.with_fresh_noise(generator)."
            )
        if votes < 1:
            raise ValueError(f"expected at least one vote, got {votes}.")
        self.classifier = classifier
        self.votes = votes
        self.deterministic = False
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Votes. Shapes: [B,C,H,W] -> [B,K]."""
        counts = torch.zeros(len(x), self.num_classes, dtype=x.dtype, device=x.device)
        for _ in range(self.votes):
            logits = self.classifier(x)
            if bool(torch.isnan(logits).any()):
                raise FloatingPointError(
                    "the classifier's logits became NaN and cannot vote; infinity minus infinity "
                    "or 0/0 in it is the likely cause."
                )
            counts += nn.functional.one_hot(logits.argmax(1), self.num_classes).to(counts)
        return counts
