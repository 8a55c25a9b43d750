"""Numbers without holes: a missing one would make some tests NaN, and others significant."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike


def check_known(numbers: ArrayLike, what: str) -> None:
    """Raise ValueError if one of `numbers`, (N,), is missing (NaN) or infinite; the message names it and its place.

    Of a table's column the place is the row's label, as the seed.
    """
    values = np.asarray(numbers, dtype=float)
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        place = numbers.index[bad[0]] if isinstance(numbers, pd.Series) else bad[0]
        raise ValueError(
            f"{what}: {values[bad[0]]} at {place}, {len(bad)} of {len(values)} are missing or infinite: leave these "
            "out, or measure them again"
        )
