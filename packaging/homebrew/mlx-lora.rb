# VERSION and SHA256 are placeholders: packaging/homebrew/render.py fills them in from the built source archive.
class MlxLora < Formula
  include Language::Python::Virtualenv

  desc "Train LoRA and QLoRA adapters on Apple silicon with MLX"
  homepage "https://github.com/mlx-lora/mlx-lora"
  url "https://github.com/mlx-lora/mlx-lora/releases/download/v@VERSION@/mlx_lora-@VERSION@.tar.gz"
  sha256 "@SHA256@"
  license "Apache-2.0"

  depends_on arch: :arm64
  depends_on :macos
  depends_on "python@3.13"

  def install
    virtualenv_create(libexec, "python3.13", without_pip: false)
    # Dependencies come as wheels from PyPI, as MLX has no source archive there that Homebrew could build.
    system libexec/"bin/python", "-m", "pip", "install", "#{buildpath}[serve,plots]"
    bin.install_symlink libexec/"bin/mlx-lora"
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/mlx-lora --version")
    assert_match "bard", shell_output("#{bin}/mlx-lora train --help-all")
  end
end
