"""The places of the studio. Each is one Python file in this folder, its routes, and one JavaScript file beside it, its page.

A new place changes no other file. All of a place for notes would be notes.py

    from mlx_lora.studio.web import json_route

    def routes(studio):
        return [json_route("/api/notes", lambda request, body: {"notes": ["Try rank 32"]})]

and notes.js

    import { get } from "../pages/api.js";
    import { Heading, html } from "../pages/parts.js";
    import { useAsked } from "../pages/state.js";

    export const title = "Notes"; // in the sidebar
    export const order = 60; // there, after Talk & ship
    export const icon = "M5 3h14v18H5z"; // a path of 24 x 24, or the name of one in parts.js

    export function Place({ path }) { // of #/notes/a/b, path is ["a", "b"]
      const [answer] = useAsked((signal) => get("notes", signal), []);
      return html`<${Heading} title="Notes">${answer?.notes.join(", ")}<//>`;
    }
"""
