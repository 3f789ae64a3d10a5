"""How much is fetched from elsewhere: a wrong name shall fill no disk."""

from __future__ import annotations

from cartridges_jax.command_line.errors import UserError


def check_size(source: str, size: int, most: int) -> None:
    """Refuses to fetch the files of `source`, `size` bytes in all, if that is more than `most`.

    Raises:
      UserError: it is.
    """
    if size > most:
        raise UserError(
            f"the files of {source} have {size / 1e9:,.1f} GB, and at most {most / 1e9:,.1f} GB are fetched: is it the "
            "right name? If so, download them by hand and give their folder"
        )
