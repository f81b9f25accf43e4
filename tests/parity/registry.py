"""The kinds of golden files that can be run. A new one is one file with a ``KIND`` and one line here."""

from tests.parity import beit, convmae, dalle, fcmae, spark
from tests.parity.golden import Golden, GoldenError, Kind

KINDS: tuple[Kind, ...] = (dalle.KIND, beit.KIND, fcmae.KIND, spark.KIND, convmae.KIND, convmae.CLASSIFIER)


def kind_of(golden: Golden) -> Kind:
    """The one kind whose keys the file has."""
    found = [kind for kind in KINDS if kind.recognise(golden)]
    if len(found) != 1:
        known = ", ".join(kind.name for kind in KINDS)
        raise GoldenError(f"{golden.path}: {len(found)} of the known kinds recognise its keys; known are {known}")
    return found[0]
