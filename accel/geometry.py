"""What a recipe or a check needs to know of a model: its sites, their heads, its layout."""

from dataclasses import dataclass

from accel.layout import Layout


@dataclass(frozen=True, slots=True)
class Site:
    """One self- or joint-attention call of a denoiser block, named by its module path."""

    name: str
    heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model as plans see it. `layout` is None where it is known only once the model is called."""

    model: str
    sites: tuple[Site, ...]
    layout: Layout | None = None

    def site(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)
