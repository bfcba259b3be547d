"""Graph-pass stage (onnx_ir): Q/DQ insertion, timestep tables and lowering per runtime. Stage package, not API."""
