"""Images in: folders, file lists and tar shards, decoding, transforms, the loader, packing, and the embedded demo set.

Nothing here knows about methods, processes or devices: a ``Loader`` is told its rank and world size.
"""
