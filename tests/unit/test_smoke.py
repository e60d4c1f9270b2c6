def test_lora(tiny, data_file, tmp_path, run):
    r = run(
        "fine_tune_qwen.py",
        "--use_lora",
        "--model_name_or_path",
        tiny(),
        "--data_path",
        data_file,
        "--val_size",
        "4",
        "--output_dir",
        tmp_path / "out",
        "--max_steps",
        "3",
        "--logging_steps",
        "1",
    )
    print(r.stdout, r.stderr)
    assert r.returncode == 0
    r = run("inference_lora.py", "--lora_model", tmp_path / "out", "--prompt", "hello", "--max_new_tokens", "5")
    print(r.stdout, r.stderr)
    assert r.returncode == 0
