"""The flags that the programs are run with, by network, and the figures published for them."""

# What the networks are trained and run with, by network, or network and start. The published
# figures were made with these of vgg16 and resnet38, which differ in the learning rate only.
RECIPES = {
    network: {
        "train_cls": f"--lr {lr} --batch_size 16 --max_epoches 15 --crop_size 448 --wt_dec 5e-4",
        "infer_cls": "--low_alpha 4 --high_alpha 32",
        "train_aff": f"--lr {lr} --batch_size 8 --max_epoches 8 --crop_size 448 --wt_dec 5e-4",
        "infer_aff": "--alpha 16 --beta 8 --radius 5 --logt 8",
        "train_seg": f"--lr 0.001 --batch_size 10 --max_iters 20000 --wt_dec 5e-4 {augmentation}",
        "infer_seg": f"--crf {test}",
    }
    for network, lr, augmentation, test in (
        (
            "vgg16",
            0.1,
            "--crop_size 321 --scale 1 1 --hsv_shift 0",
            "--scales 1 --crf_steps 10 --crf_bilateral 4 121 5",
        ),
        ("resnet38", 0.01, "--crop_size 448 --poly_first_group", ""),
    )
}
# Where fc6 and fc7 are not in the start weights, larger learning rates diverge.
RECIPES["vgg16_convolutions"] = RECIPES["vgg16"] | {
    "train_cls": "--lr 0.003 --momentum 0.9 --batch_size 16 --max_epoches 15 --crop_size 448 "
    "--wt_dec 5e-4",
    "train_aff": "--lr 0.01 --momentum 0.9 --batch_size 8 --max_epoches 8 --crop_size 448 "
    "--wt_dec 5e-4",
}
# VOC's 2007 images from VGG-16's convolutions, in an hour on two cores; chosen on train.
RECIPES["small"] = {
    "train_cls": "--lr 0.003 --momentum 0.9 --batch_size 16 --max_epoches 15 --crop_size 320 "
    "--wt_dec 5e-4 --val_crop_size 320",
    "infer_cls": "--low_alpha 4 --high_alpha 32 --scales 1 0.5",
    "train_aff": "--lr 0.01 --momentum 0.9 --batch_size 8 --max_epoches 12 --crop_size 320 "
    "--wt_dec 5e-4",
    "infer_aff": "--alpha 8 --beta 8 --radius 5 --logt 4",
    "train_seg": "--lr 0.001 --batch_size 10 --max_iters 600 --wt_dec 5e-4 --crop_size 224 "
    "--scale 0.5 1 --hsv_shift 0",
    "infer_seg": "--scales 0.75 --crf --crf_steps 10 --crf_bilateral 4 121 5",
}
# IRN's classifier. Nobody has published AffinityNet with this backbone: its settings are untried.
RECIPES["resnet50"] = RECIPES["resnet38"] | {
    "train_cls": "--lr 0.1 --batch_size 16 --max_epoches 5 --crop_size 512 --wt_dec 1e-4",
}
# From scratch, on the toy devkit: hence a customary momentum, small crops and a short walk.
RECIPES["tiny"] = {
    "train_cls": "--lr 0.05 --momentum 0.9 --batch_size 8 --max_epoches 40 --crop_size 160 "
    "--resize_long 128 224 --val_crop_size 192",
    "infer_cls": "--low_alpha 4 --high_alpha 32",
    "train_aff": "--lr 0.1 --momentum 0.9 --batch_size 8 --max_epoches 20 --crop_size 160",
    "infer_aff": "--alpha 16 --beta 8 --radius 5 --logt 4",
    "train_seg": "--lr 0.01 --batch_size 8 --max_iters 800 --crop_size 160 --scale 0.75 1.5 "
    "--hsv_shift 0",
    "infer_seg": "--scales 1.5 2 --crf",
}

NETWORKS = ("resnet38", "resnet50", "tiny", "vgg16")

# mIoU in per cent on train and val as the released code reports it for these recipes; IRN reports
# ResNet-50's.
PUBLISHED = {
    "vgg16": {"cam": (48.9, 46.6), "rw": (59.6, 54.0), "seg": (None, 58.4)},
    "resnet38": {
        "cam": (47.7, 47.2),
        "rw": (61.0, 60.2),
        "rw_crf": (59.7, None),
        "seg": (None, 61.7),
    },
    "resnet50": {"cam": (48.3, None)},
}
PUBLISHED_TEST = {"vgg16": 60.5, "resnet38": 63.7}  # of the segmenters, by VOC's server
