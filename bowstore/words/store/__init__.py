"""Where words lie: a Zarr group that is written safely, read with every check, and verified."""
