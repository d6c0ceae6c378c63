# The words between @ are placeholders: packaging/homebrew/render.py fills them in from the built source archive and a lock file.
class MlxLora < Formula
  include Language::Python::Virtualenv

  desc "Train LoRA and QLoRA adapters on Apple silicon with MLX"
  homepage "https://github.com/mlx-lora/mlx-lora"
  url "https://github.com/mlx-lora/mlx-lora/releases/download/v@VERSION@/mlx_lora-@VERSION@.tar.gz"
  sha256 "@SHA256@"
  license "Apache-2.0"

  depends_on arch: :arm64
  depends_on macos: :sonoma
  depends_on "python@3.13"

  # Libraries of wheels that find each other by @rpath keep doing so.
  preserve_rpath

  # Dependencies come as wheels from PyPI, as MLX has no source archive there that Homebrew could build.
@RESOURCES@

  def install
    wheels = buildpath/"wheels"
    resources.each { |wheel| wheel.stage(wheels) }
    virtualenv_create(libexec, "python3.13", system_site_packages: false)
    # Only from these files: nothing else is downloaded, and pip checks that they are what mlx-lora asks for.
    system "python3.13", "-m", "pip", "--python=#{libexec}/bin/python", "install", "--no-index", "--find-links=#{wheels}",
           "#{buildpath}[serve,plots]"
    bin.install_symlink libexec/"bin/mlx-lora"
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/mlx-lora --version")
    assert_match "bard", shell_output("#{bin}/mlx-lora train --help-all")
  end
end
