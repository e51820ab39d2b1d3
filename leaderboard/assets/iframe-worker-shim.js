// Browsers refuse Web Workers on pages opened from a file. The theme's search runs in one, so that a site read from
// disk has no search. Here a hidden frame plays the worker: same messages, same thread.
(function () {
  "use strict";
  if (location.protocol !== "file:") return;

  class FrameWorker extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = null;
      this.onerror = null;
      this.waiting = [];
      const frame = (this.frame = document.createElement("iframe"));
      frame.hidden = true;
      frame.title = "search worker";
      document.body.appendChild(frame);
      const inside = frame.contentDocument;
      inside.open(); // an opened document is not replaced later by the empty one that some browsers load
      inside.write("<!doctype html><title>search worker</title>");
      inside.close();
      const scope = (this.scope = frame.contentWindow);
      scope.postMessage = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      scope.importScripts = async (...addresses) => {
        for (const address of addresses) await this.load(address);
      };
      this.load(url).then(
        () => {
          const messages = this.waiting;
          this.waiting = null;
          messages.forEach((data) => this.postMessage(data));
        },
        () => {
          const event = new Event("error");
          this.dispatchEvent(event);
          if (this.onerror) this.onerror(event);
        }
      );
    }

    load(url) {
      return new Promise((resolve, reject) => {
        const script = this.scope.document.createElement("script");
        script.src = new URL(url, document.baseURI).href;
        script.onload = resolve;
        script.onerror = reject;
        this.scope.document.body.appendChild(script);
      });
    }

    postMessage(data) {
      if (this.waiting) {
        this.waiting.push(data);
        return;
      }
      setTimeout(() => this.scope.dispatchEvent(new this.scope.MessageEvent("message", { data })), 0);
    }

    terminate() {
      this.frame.remove();
    }
  }

  window.Worker = FrameWorker;
})();
