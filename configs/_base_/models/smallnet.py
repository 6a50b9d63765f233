# model settings
data_preprocessor = dict(
    type='CIFARDataPreprocessor', mean=[125.307, 122.961, 113.8575], std=[51.5865, 50.847, 51.255]
)
model = dict(type='SmallNet', kernel_size=7, num_classes=10)
