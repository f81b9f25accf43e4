"""Weights of the papers' released code, renamed for our networks: strictly, or not at all.

A conversion knows every key it expects, with its shape. Anything missing, left over or of another shape is an
``InteropError`` that lists the keys; no tensor is silently dropped or left at its initial value.

One file per released code (``dalle``, ``beit``, ``spark``, ``fcmae``, ``convmae``) and library (``torchvision``, ``hub``).
``source`` reads any of them, and our own runs (``zero``: DeepSpeed's checkpoints), ``kinds`` says which it is, ``fit`` makes
it fit a network and reports every key. ``python -m models.interop`` is the command line.
"""

from models.interop.beit import convert_beit, export_beit
from models.interop.convmae import convert_convmae, export_convmae, official_convmae_key
from models.interop.dalle import convert_dalle, load_dalle, official_dalle_key
from models.interop.fcmae import convert_fcmae, export_fcmae, official_fcmae_key
from models.interop.spark import convert_spark, spark_keys
from models.interop.strict import InteropError, rename_strictly, require
from models.interop.torchvision import export_torchvision, torchvision_name

__all__ = [
    "InteropError",
    "convert_beit",
    "convert_convmae",
    "convert_dalle",
    "convert_fcmae",
    "convert_spark",
    "export_beit",
    "export_convmae",
    "export_fcmae",
    "export_torchvision",
    "load_dalle",
    "official_convmae_key",
    "official_dalle_key",
    "official_fcmae_key",
    "rename_strictly",
    "require",
    "spark_keys",
    "torchvision_name",
]
