"""How `make site` makes a web site of the notebooks: Sphinx with MyST, from the stored outputs, without a network."""

project = html_title = "Build GPT-NeoX"
root_doc = "index"
extensions = ["myst_nb", "neox_lib.course.site"]
exclude_patterns = ["mine", "student", "README.md", "**.ipynb_checkpoints"]

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

html_theme = "furo"
html_copy_source = False
html_show_search_summary = False  # the summaries are fetched, which pages opened as files may not do
html_show_copyright = html_use_index = False
html_css_files = ["site.css"]
html_static_path = ["_site"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2", "picture": "none"},
    "dark_css_variables": {
        "color-brand-primary": "#56b4e9",
        "color-brand-content": "#56b4e9",
        "picture": "invert(0.93) hue-rotate(180deg)",
    },
}
