"""What a model is and what it costs, in a few lines for people."""

from __future__ import annotations

import html
from abc import abstractmethod

from torch import nn


class Described:
    """A model that ``print`` and notebooks show by :meth:`facts`; ``repr`` still has every layer."""

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """What it is and costs, by name."""

    def __str__(self) -> str:
        facts = self.facts()
        width = max(map(len, facts))
        return "\n".join([type(self).__name__, *(f"  {name:<{width}}  {value}" for name, value in facts.items())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><th style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(value)}</td></tr>'
            for name, value in self.facts().items()
        )
        return f"<table><caption><b>{html.escape(type(self).__name__)}</b></caption>{rows}</table>"


def size(*modules: nn.Module) -> str:
    """The number of their parameters in words."""
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return f"{count / 1e6:.2f} M parameters" if count >= 1e5 else f"{count:,} parameters"


def parts(module: nn.Module) -> str:
    """Its direct children that hold parameters, each with its size."""
    sizes = {name: size(child) for name, child in module.named_children()}
    return ", ".join(f"{name} {text}" for name, text in sizes.items() if not text.startswith("0 "))
