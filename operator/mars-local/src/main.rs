//! The `mars-local` program; see [`mars_local::cli`].

fn main() -> std::process::ExitCode {
    mars_local::cli::run()
}
