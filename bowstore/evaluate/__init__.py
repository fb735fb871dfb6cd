"""From a frozen backbone to the numbers of a protocol: features, linear probe, VOC07 SVMs, result files."""
