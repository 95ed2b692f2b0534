"""Reports on a run or model: console, TensorBoard, profiles and costs."""
