"""The routing-path predictor (He et al., arXiv 2410.17954): data, model, training, evaluation, files, live use."""
