"""The look-up of a route that ``torch.compile`` must not trace: it would bake one route into the compiled code.

A module of its own, imported only while something is being compiled: ``torch.compiler.disable`` loads the
whole compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorakit.attach.routing import Routing, scoped
from lorakit.core.route import Route

scoped_uncompiled: Callable[[Routing, bool], Route] = torch.compiler.disable(scoped)
