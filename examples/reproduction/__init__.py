"""Cards and small files of the models that ``reproduce_vix.py`` trains on CIFAR-10."""
