"""Pictures of a model at work, for its user's own sentences.

    heads            attention heads as a page to click through, one file without network; figures for papers
    positions        tables of positions
    distributions    what the model says the next token is, beside what it should say
    beam             the tree of a beam search
    masks            what a combination of masks lets through

The page of heads needs nothing but this package; all else is drawn by matplotlib (extra `show`). Everything displays
itself in Jupyter and has `save(path)`. On the command line: `fused-transformer show --help`.
"""

from fused_transformer.beam_tree import BeamTree
from fused_transformer.show.beam_picture import beam, trace_beams
from fused_transformer.show.heads_page import Heads, heads, side_by_side
from fused_transformer.show.linking import Link, LinkingHead, linking_heads
from fused_transformer.show.mask_grids import allowed, masks
from fused_transformer.show.output_distributions import distributions, output_distributions
from fused_transformer.show.picture import Picture
from fused_transformer.show.position_tables import positions

__all__ = [
    "BeamTree",
    "Heads",
    "Link",
    "LinkingHead",
    "Picture",
    "allowed",
    "beam",
    "distributions",
    "heads",
    "linking_heads",
    "masks",
    "output_distributions",
    "positions",
    "side_by_side",
    "trace_beams",
]
