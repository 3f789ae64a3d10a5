"""A limit on what is fetched, so that a wrong name does not fill the disk."""

from __future__ import annotations

from cartridges_jax.command_line.errors import UserError


def check_size(source: str, size: int, most: int) -> None:
    """Raises a UserError if the files of `source`, which have `size` bytes, have more than `most`."""
    if size > most:
        raise UserError(
            f"the files of {source} have {size / 1e9:,.1f} GB, and at most {most / 1e9:,.1f} GB are fetched: is it the "
            "right name? If so, download them by hand and give their folder"
        )
